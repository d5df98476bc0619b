"""Task sets: drawn from generators, read from files and from public layouts."""

from m1.data.tasks.drawing import TaskSplits, make_tasks, num_shared_prompts
from m1.data.tasks.files import read_tasks, write_tasks

__all__ = ["TaskSplits", "make_tasks", "num_shared_prompts", "read_tasks", "write_tasks"]
