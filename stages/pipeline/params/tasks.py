"""What params must know of the tasks: names and a limit, written again so that refusing a value loads no task."""

LEARNED_LATE = ("adjacent", "lacks", "precedes", "arithmetic")  # the base learns a little of them, in a late phase
NEW_TASKS = (*LEARNED_LATE, "contains")
HYPOTHESES = ("positional", "object_value", "box_label_value", "next_clause")  # of what a group of heads carries
WORDINGS = (
    "text_start",
    "text_end",
    "contained",
    "segment_start",
    "segment_end",
    "add_box",
    "other_order",
    "no_comma",
    "add_comma",
    "clause",
)  # of the source
MOST_BOXES = 25  # one letter fewer than there are: the query of a corrupt partner needs one that no box has
