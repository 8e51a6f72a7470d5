"""Stage one: from slides to stored features.

`patching` finds the patches of a slide and stores them; `extract` renders their views, batches them over slides
(`batching`), runs the encoders and writes shards. `repair` takes up slides that were copied anew.
"""
