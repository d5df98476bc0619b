"""Logic tasks: generators with difficulty and verifiers that judge the answer itself."""
