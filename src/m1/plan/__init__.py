"""What a recipe will need before it runs: parameters, memory, FLOPs, time, cost. Arithmetic only.

Nothing here imports torch or megatron: every number follows from the recipe and from the formulas
that the modules cite.
"""
