"""`python -m se_prune_cli`, which torchrun starts as `torchrun … -m se_prune_cli`."""

from se_prune_cli.app import main

main()
