"""The one exception for what the user can put right."""


class UserError(Exception):
    """A mistake in the user's input, said in one line.

    Args:
        where: the place: a file with its line, a recipe key, a command-line option.
        problem: the value that was found and what was expected instead.
        remedy: what to do about it.

    The command line prints `where: problem; remedy` and ends with exit code 2.
    """

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        self.where, self.problem, self.remedy = where, problem, remedy
        super().__init__(f"{where}: {problem}; {remedy}")
