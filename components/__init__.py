"""One thin KFP component per stage: each imports the installed package and runs that stage."""
