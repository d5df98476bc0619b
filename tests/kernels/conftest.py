import os

import torch

if not torch.cuda.is_available():  # before the first import of a kernel
    os.environ["TRITON_INTERPRET"] = "1"
