"""What a model is: views, facts, text, cost, and the edits of a graph. Imports nothing else of burnish."""
