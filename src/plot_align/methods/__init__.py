"""The methods that PLOT is combined and compared with: PRO and DEFT."""
