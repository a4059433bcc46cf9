"""
ARPO in a game of TextArena: guess a number between 1 and 20, with "higher" and "lower" for an answer.

```bash
pip install textarena
python examples/environments/textarena_game.py          # `--small` for a model built on the spot
```

The game is Python objects alone, so a fork gets a deep copy of it, and the class needs no `fork()`. TextArena draws
from Python's global random numbers: `reset` seeds them for the game and puts them back. Other games for one player
that need no word list fit in the same way: Mastermind, FrozenLake, TowerOfHanoi, LightsOut. One that draws in the
midst of the game, such as 2048, is not `deterministic`.
"""

import random
from argparse import Namespace

import textarena
from training import Player, ask, demonstrate, parse, train

TASK = "Find the number with the tool. Stop when the game is over.\n\n"
LOWEST, HIGHEST = 1, 20


class GuessTheNumber:
    """One game."""

    deterministic = True  # the number is drawn in `reset`, from its seed, and nothing is drawn later

    def reset(self, seed: int, **kwargs) -> str:
        self._game = textarena.make("GuessTheNumber-v0-raw")
        before = random.getstate()
        self._game.reset(num_players=1, seed=seed)
        random.setstate(before)
        return self._news()

    def guess(self, number: int) -> str:
        """
        Guess the number.

        Args:
            number: A number between 1 and 20.

        Returns:
            Whether the number that you look for is higher or lower.
        """
        if self._game.state.done:
            raise ValueError("The game is over.")
        self._game.step(f"[{number}]")
        return self._news()

    def get_reward(self) -> float:
        """TextArena's own: 1 for the number, else by how near the last guess of a finished game was."""
        return float((self._game.state.rewards or {0: 0.0})[0])

    def _news(self) -> str:
        """What the game has said since the last time."""
        _, messages = self._game.get_observation()
        news = [text for speaker, text, _ in messages if speaker == textarena.GAME_ID]
        if self._game.state.done:
            news.append(self._game.state.game_info[0]["reason"])
        return "\n".join(news)


def rows(seed: int, number: int) -> list[dict]:
    """As many games. The rows of a group are copies of one, so they look for the same number."""
    return [{"prompt": ask(TASK), "seed": 1000 * seed + game} for game in range(number)]


def player(seed: int) -> Player:
    """Guesses anywhere between what is known; the reward teaches to guess in the middle."""
    rng = random.Random(seed)
    low, high = LOWEST, HIGHEST
    for _ in range(5):
        number = rng.randint(low, high)
        answer = yield "guess", {"number": number}
        if "higher" in answer:
            low = number + 1
        elif "lower" in answer:
            high = number - 1
        else:
            break
    return "I stop here."


def demonstration(row: dict) -> dict:
    game = GuessTheNumber()
    return demonstrate(ask(TASK + game.reset(**row)), [game.guess], player(row["seed"]))


def main(arguments: Namespace, **settings):
    # Games of the demonstrations are others
    demonstrations = [demonstration(row) for row in rows(arguments.seed + 1, 60)]
    return train(
        arguments,
        rows(arguments.seed, 64),
        demonstrations,
        environment_factory=GuessTheNumber,
        **{"max_completion_length": 400, **settings},
    )


if __name__ == "__main__":
    main(parse(__doc__))
