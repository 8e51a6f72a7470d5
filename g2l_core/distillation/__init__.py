"""Stage two: a student learns a teacher's stored features of the very pixels that it sees.

`loader` replays views with their targets, `objective` compares projected features with them by one of the
`losses`, and `training.train` runs the loop: `optim`, `checkpoints`, `logs`, and `validation` on a held-out
set.
"""
