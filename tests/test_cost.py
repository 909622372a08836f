"""What a run will cost, said before it starts."""

from stages.pipeline.cost import estimate, slowness, table
from stages.pipeline.params import load_params
from tests.conftest import REPOSITORY


def test_the_estimate_counts_the_cells_of_the_pipeline() -> None:
    params = load_params(REPOSITORY / "params.yaml")
    costs = estimate(params)
    seeds, arms, models, rates = map(len, (params.seeds, params.arms, params.models, params.learning_rates))
    # code, source, synthesize, contrast, report; pretrain; match, matchings, cmap, drift; finetune; discover, evaluate,
    # dcm
    assert costs["dvc"][0] == 5 + seeds * (1 + (4 + rates) * arms + 3 * models)
    further = estimate(params.model_copy(update={"learning_rates": [*params.learning_rates, 1e-5]}))
    assert {stage for stage in costs if further[stage] > costs[stage]} == {"finetune", "dvc"}
    more = estimate(params.model_copy(update={"seeds": [*params.seeds, 99]}))
    assert all(more[stage][1] >= seconds > 0 for stage, (_, seconds) in costs.items())
    twice = estimate(params, slower=2.0)
    assert {stage: (cells, 2 * seconds) for stage, (cells, seconds) in costs.items()} == twice
    tests = params.synthesize.model_copy(update={"old": params.synthesize.old | {"evaluation": 512}})
    longer = {
        stage
        for stage, cost in estimate(params.model_copy(update={"synthesize": tests})).items()
        if cost > costs[stage]
    }
    assert longer == {"matchings", "evaluate", "dcm", "cmap", "drift"}, "what larger test sets cost"
    outputs = estimate(params.model_copy(update={"cmap": params.cmap.model_copy(update={"inputs": ()})}))
    assert {stage for stage in costs if outputs[stage] < costs[stage]} == {"cmap"}
    hours = sum(seconds for _, seconds in costs.values()) / 2 / 3600
    assert f"about {hours:.1f} hours" in table(costs, 2, 0)


def test_a_larger_model_is_slower() -> None:
    params = load_params(REPOSITORY / "params.yaml")
    size = params.pretrain.model
    deeper = size.model_copy(update={"layers": 4 * size.layers})
    large = params.model_copy(update={"pretrain": params.pretrain.model_copy(update={"model": deeper})})
    assert slowness(large) > 2 * slowness(params) > 0
