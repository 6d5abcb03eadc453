"""PRO and DEFT, the methods that PLOT is combined and compared with, and filters of pairs."""
