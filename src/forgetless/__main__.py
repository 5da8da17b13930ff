"""python -m forgetless"""

from .cli import main

main()
