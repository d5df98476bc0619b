"""The pipeline's DAG, its compilation, and its run on one machine."""
