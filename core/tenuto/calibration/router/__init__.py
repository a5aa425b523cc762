"""The cache router: HarmoniCa training and the search for schedules."""
