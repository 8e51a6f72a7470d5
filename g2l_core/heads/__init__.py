"""A fitted classifier that travels with its encoder: from the features of a slide's patches to the slide's answer.

`head.Head` is what `g2l fit-head` writes and `g2l predict` applies. `calibration` makes its probabilities mean what
they say, and `heatmap` draws what it says of each patch.
"""
