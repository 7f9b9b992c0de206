"""What `component_name` names: a selector looks at a training run between two steps and scores the training rows.

A selector is a class with one method, `score`. For instance, in a file mymod.py of a package mypkg:

    \"\"\"Prefer rows with many supervised tokens.\"\"\"

    import numpy as np

    from dataflex.data.encoding import UNSUPERVISED
    from dataflex.influence.scores import Scores
    from dataflex.selectors.protocol import Situation


    class Long:
        \"\"\"A row's score is the number of its tokens that training learns from.\"\"\"

        def score(self, situation: Situation) -> Scores:
            examples = situation.train.examples
            lengths = np.zeros(len(examples))
            for index, example in enumerate(examples):
                lengths[index] = sum(label != UNSUPERVISED for label in example.labels)
            situation.progress.say(f"the longest row has {lengths.max():.0f} supervised tokens")
            return situation.scores(lengths)

It runs as it stands, wherever Python finds the package:

    dataflex dynamic run.yaml component_name=mypkg.mymod:Long

A package that is installed can give it a name, by an entry point in its pyproject.toml, for component_name=long:

    [project.entry-points."dataflex.selectors"]
    long = "mypkg.mymod:Long"

To add one to dataflex itself: a file here, and a line in table.py. `Situation` (protocol.py) says what a selector can
see: the model, the optimizer's moments, the rows, and where it may keep files.
"""
