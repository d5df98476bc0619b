"""Software engineering tasks: real and made bugs, their environments, validation and grading."""
