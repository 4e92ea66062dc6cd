"""Mixed traffic with all that goes wrong in it, and then a look at what is left behind."""
