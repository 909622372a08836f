"""What params must know of the curriculum and its prompts, written again so that refusing a value does not load them.
What they must know of old and new tasks is asked of those, which is quick."""

LEARNED_LATE = ("adjacent", "lacks", "precedes", "arithmetic")  # the base learns a little of them, in a late phase
MOST_BOXES = 25  # one letter fewer than there are: the query of a corrupt partner needs one that no box has
