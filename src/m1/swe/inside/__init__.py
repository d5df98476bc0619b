"""Programs that run inside the sandbox: sent over standard input, standard library only."""
