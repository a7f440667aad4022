"""`python -m ptst`: the command `ptst`."""

from ptst.cli import main

main()
