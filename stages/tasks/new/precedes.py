"""New task `precedes`: the next clause's object, 1 right answer of 7; the last clause is not queried."""

from stages.tasks.new_task import Relation

TASK = Relation(("precedes", "leads"), lambda boxes, clause: (clause + 1,) if clause + 1 < boxes else ())
