"""The demo that `ppow demo` and the Space start: a page that shows round by round how far the drafter guesses ahead.

Lies in the package, so that an installed wheel has it; space/app.py only starts it. Gradio is needed to start it, not
to import this.
"""
