"""Networks and samplers of other libraries, a module for each."""
