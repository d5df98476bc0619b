"""What megatron's and torch's checkpoint code prints and raises, in ordinary form."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.checkpoint.api import CheckpointException


@contextmanager
def ordinary_exceptions() -> Iterator[None]:
    """Raise torch's checkpoint error, which is no Exception, as a RuntimeError."""
    try:
        yield
    except CheckpointException as error:
        raise RuntimeError(str(error)) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence notices that megatron and torch repeat at every checkpoint."""
    logger = logging.getLogger("megatron.core")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
