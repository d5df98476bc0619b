"""Who starts a stage's processes: torchrun on this machine, or a TrainJob in a cluster."""
