"""New task `contains`: entity tracking itself, for a base that still has something of it to learn."""

from stages.tasks.new_task import Relation

TASK = Relation(("contains", "holds", "has"), lambda boxes, clause: (clause,))
