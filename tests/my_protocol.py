"""A protocol of a user's own, found by its name: `CALL name text!`, and scripted models skip `<result>…</result>`."""

from arpo_trl.protocols import ToolProtocol, Turn, encode_plain
from arpo_trl.tools import ToolCall


class WordProtocol(ToolProtocol):
    reserved_names = frozenset({"CALL"})
    stop_strings = ["!"]

    def parse(self, ids, context, tools):
        _, called, rest = self.tokenizer.decode(ids).partition("CALL ")
        if not called or "!" not in rest:
            return Turn(ids, [])
        name, _, text = rest.partition("!")[0].partition(" ")
        return Turn(ids, [ToolCall(name, {"query": text})])

    def result_ids(self, calls, written=()):
        return encode_plain(self.tokenizer, "".join(f"<result>{call.result}</result>" for call in calls))

    def results_turn(self, calls, written=()):
        return [self.result_ids(calls)]

    def completion(self, turns, conversational):
        return "|".join(self.tokenizer.decode(ids, skip_special_tokens=True) for ids in turns)


class Unfinished(ToolProtocol):
    def parse(self, ids, context, tools):
        return Turn(ids, [])
