"""`python -m upq`, and `torchrun --nproc-per-node N -m upq quantize …`."""

from upq.cli import main

main()
