"""What a person sees of a run: a live view on a terminal, plain lines elsewhere.

`reporter` is doit's reporter, found by its entry point. Builds tell what they do (`telling`), those in the processes of
`doit -n` through a socket (`hearing`); what is known of each task is on a `board`, and is shown by `live` or `plain`.
"""
