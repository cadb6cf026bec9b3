"""`python -m webchannels`"""

from webchannels import main

main()
