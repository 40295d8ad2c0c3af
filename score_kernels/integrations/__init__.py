"""Other libraries' networks and samplers with this one's scores and steps, a module for each."""
