"""The floor of the house: types, masks and sharding, on which every other folder stands."""
