"""gossamer chat and the conversation behind it: answers, streaming, memory, templates, folders, refusals."""

import json

import pytest
import torch
from conftest import WORDS, llama, record
from typer.testing import CliRunner

import gossamer as gs
from gossamer.core.errors import GossamerError, TargetError
from gossamer.kernels.cpu import target
from gossamer.runtime.talk import Decoded, Talk, _Pieces, chooser

t = pytest.importorskip("transformers")
DECODES = target.supports("bitmask_bfloat16") is None
TEMPLATE = (
    "{% for m in messages %}{{ {'user': 'word1', 'assistant': 'word2', 'system': 'word3'}[m['role']] }} "
    "{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}word2 {% endif %}"
)


def model_of(folder):
    return t.AutoModelForCausalLM.from_pretrained(folder).eval(), t.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def pair(llama_folder):
    return model_of(llama_folder)


def gpt2():
    torch.manual_seed(0)
    return t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64)).eval()


def greedy(model, tokenizer, ids, count):
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=[]
        )
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_answers_are_those_of_the_model_and_come_in_pieces(kind, pair):
    model, tokenizer = (gpt2() if kind == "gpt2" else pair[0]), pair[1]
    talk = Talk(model, tokenizer, max_tokens=8)
    talk.stop, pieces = set(), []
    answer = talk.ask("word4 word9", pieces.append)
    ids = tokenizer("word4 word9").input_ids
    assert answer.text == "".join(pieces) == greedy(model, tokenizer, ids, 8)
    assert len(pieces) > 3 and answer.tokens == 8 and answer.ended == "length" and answer.prompt_tokens == len(ids)
    decoded = kind == "llama" and DECODES
    assert isinstance(talk.engine, Decoded) == decoded and (talk.why is None) == decoded
    if kind == "gpt2":
        assert "llama" in talk.why


def test_without_a_template_the_text_goes_on_and_reset_forgets(pair):
    model, tokenizer = pair
    talk = Talk(model, tokenizer, max_tokens=5)
    talk.stop = set()
    first = talk.ask("word4 word9")
    ids = list(talk._ids)
    second = talk.ask("word7")
    assert second.text == greedy(model, tokenizer, [*ids, *tokenizer("word7").input_ids], 5)
    assert second.prompt_tokens == len(ids) + 1
    talk.reset()
    assert talk.ask("word4 word9").text == first.text


def test_a_template_shapes_the_conversation(pair):
    model, tokenizer = pair
    tokenizer.chat_template = TEMPLATE
    talk = Talk(model, tokenizer, max_tokens=4, system="word50")
    talk.stop = set()
    first = talk.ask("word10").text
    assert first == greedy(model, tokenizer, tokenizer("word3 word50 word1 word10 word2").input_ids, 4)
    whole = f"word3 word50 word1 word10 word2 {first} word1 word11 word2"
    assert talk.ask("word11").text == greedy(model, tokenizer, tokenizer(whole).input_ids, 4)


def test_a_stop_token_ends_the_answer_and_is_not_said(pair):
    model, tokenizer = pair
    want = greedy(model, tokenizer, tokenizer("word4").input_ids, 8).split()
    talk = Talk(model, tokenizer, max_tokens=8)
    talk.stop = {tokenizer.convert_tokens_to_ids(want[3])}
    answer = talk.ask("word4")
    assert answer.ended == "stop" and answer.text.split() == want[: want.index(want[3])]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sampling_repeats_with_its_seed(kind, pair):
    model = gpt2() if kind == "gpt2" else pair[0]
    ask = lambda seed: Talk(model, pair[1], max_tokens=12, temperature=3.0, seed=seed).ask("word4").text
    assert ask(1) == ask(1) != ask(2)


def test_choosing_follows_the_softmax():
    logits_V = torch.tensor([0.0, 2.0, -1.0])
    assert chooser(0, 0)(logits_V) == 1
    pick = chooser(2.0, 0)
    counts = torch.tensor([pick(logits_V) for _ in range(2000)]).bincount(minlength=3) / 2000
    assert torch.allclose(counts, (logits_V / 2).softmax(0), atol=0.04)


def test_half_a_character_waits_for_the_other_half():
    class Bytes:
        def decode(self, tokens, skip_special_tokens):
            return bytes(tokens).decode("utf-8", errors="replace")

    said = []
    pieces = _Pieces(Bytes(), said.append)
    for byte in "aé".encode():
        pieces.hear(byte)
    assert said == ["a", "é"] and pieces.finish() == "aé"


def test_a_full_context_and_other_models_are_refused(pair):
    model, tokenizer = pair
    talk = Talk(model, tokenizer, context=16, max_tokens=99)
    talk.stop = set()
    assert talk.ask(" ".join(WORDS[:10])).tokens == 6
    with pytest.raises(GossamerError, match="context 16"):
        talk.ask("word1")
    with pytest.raises(GossamerError, match="ask something"):
        Talk(model, tokenizer).ask("")
    with pytest.raises(GossamerError, match="chat template"):
        Talk(model, tokenizer, system="word1")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with pytest.raises(TargetError, match="BertModel"):
        Talk(t.BertModel(t.BertConfig(**small, vocab_size=64)), tokenizer)


@pytest.fixture
def folders(pair, tmp_path):
    """The same pruned model, saved in every way."""
    model, tokenizer = pair
    gs.prune(model, "magnitude", density=0.5)
    ids = {"input_ids": torch.arange(8)[None]}
    packed = gs.pack(model, ids, candidates=["csr/cpu"], repeats=1)
    return {
        "save": gs.save(packed, tmp_path / "save", tokenizer=tokenizer),
        "dense": gs.save_pretrained(model, tmp_path / "dense", tokenizer=tokenizer),
        "packed": gs.save_pretrained(packed, tmp_path / "packed", format="packed", tokenizer=tokenizer),
    }


def test_every_folder_gives_the_same_answers(folders, gossamer):
    told = {
        name: record(
            gossamer("chat", folder, "--prompt", "word4 word9", "--prompt", "word7", "--max-tokens", 6, "--json")
        )
        for name, folder in folders.items()
    }
    answers = {name: [turn["answer"] for turn in found["turns"]] for name, found in told.items()}
    assert answers["save"] == answers["dense"] == answers["packed"] and len(answers["save"]) == 2
    found = told["save"]
    assert found["engine"] == ("gossamer's decoder" if DECODES else "transformers") and found["template"] is False
    assert {"question", "answer", "tokens", "prompt_tokens", "seconds", "ended"} == set(found["turns"][0])


def test_lines_of_a_pipe_are_questions(llama_folder):
    from gossamer.cli.app import app

    lines = "word4 word9\n\n/reset\nword4 word9\n"
    run = CliRunner().invoke(app, ["chat", str(llama_folder), "--max-tokens", "5"], input=lines)
    assert run.exit_code == 0, run.stderr
    first, second = run.stdout.splitlines()
    assert first == second and first and run.stderr.count("tokens,") == 2


def test_what_cannot_be_talked_to_is_refused(bert_folder, llama_folder, tmp_path, gossamer):
    run = gossamer("chat", bert_folder, "--prompt", "word1")
    assert run.exit_code == 3 and "LlamaForCausalLM" in run.stderr
    bare = llama(tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    run = gossamer("chat", bare, "--prompt", "word1")
    assert run.exit_code == 3 and "tokenizer" in run.stderr
    assert gossamer("chat", tmp_path, "--prompt", "word1").exit_code == 3
    run = gossamer("chat", llama_folder, "--prompt", " ".join(WORDS * 2))
    assert run.exit_code == 3 and "context" in run.stderr


def test_one_json_object_even_without_questions(llama_folder):
    from gossamer.cli.app import app

    run = CliRunner().invoke(app, ["chat", str(llama_folder), "--json"], input="")
    assert run.exit_code == 0 and json.loads(run.stdout)["turns"] == []


def test_who_types_may_go_on_after_a_refusal(llama_folder, monkeypatch, capsys):
    from gossamer.cli import chat as command

    lines = iter(["word4", " ".join(WORDS * 2), "word7"])

    def typed(prompt):
        assert prompt == "> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    command.chat(str(llama_folder), None, 3, 64, 0.0, 0, None, False)
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 2 and shown.err.count("start a new one") == 1
