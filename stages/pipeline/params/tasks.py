"""What params must know of new tasks: names and a limit, written again so that refusing a value loads no task. What
they must know of old tasks is asked of those, which is quick."""

LEARNED_LATE = ("adjacent", "lacks", "precedes", "arithmetic")  # the base learns a little of them, in a late phase
NEW_TASKS = (*LEARNED_LATE, "contains", "ioi", "sums")
MOST_BOXES = 25  # one letter fewer than there are: the query of a corrupt partner needs one that no box has
