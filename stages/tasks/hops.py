"""What a search for the circuit of entity tracking is told: where the answer is read out, and how hops are named.

Prompts of entity tracking name the positions of `examples.POSITIONS`. The hops of Prakash et al. 2024 (section 3 and
appendix) start from the same ones.
"""

READOUT = "last"  # the position at which the answer is read
ROOT = "fetch_answer"  # the group that writes the answer into the logits

# position -> how it is called in the names of hops and groups; the others are called as they are
DISPLAY = {"earlier_label": "label", "earlier_object": "object", "earlier_separator": "separator"}

# name of the hop and its group, position of the senders, receiver, input of the receiver
PAPER_HOPS: tuple[tuple[str, str, str, str | None], ...] = (
    ("value_fetcher", "last", "logits", None),
    ("pos_transmitter", "last", "value_fetcher", "q"),
    ("pos_detector", "query_label", "pos_transmitter", "v"),
    ("struct_reader", "earlier_label", "pos_detector", "v"),
)
