"""What callers ask of a model besides one forward: ways of generating, caches, packed rows, losses.

It stands where transformers has its mixin of generation, which its archive does not carry. Under a recipe every answer must
be that of the model without one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from foveate.models import anatomy
from tests import tiny
from tests.suite.bodies import ONE, RAGGED

CLOSE = dict(rtol=1e-4, atol=1e-4)
MARKERS = [tiny.IMAGE, 8, 9, tiny.VIDEO]
"""Ids of placeholders and their borders, which no answer may contain."""

Ask = Callable[[Any], Any]


class Generation:
    """One test for each way of asking."""

    model_tester: Any
    attached: Any

    def _same(self, ask: Ask, **options: Any) -> Any:
        """``ask`` has the same answer, whatever runs around the model's calls; returns it."""
        build = self.model_tester.body.model  # of its own for each: what transformers sets up in a first call counts
        with self.attached.paused():
            expected = ask(build(**options))
        answer = ask(build(**options))
        torch.testing.assert_close(answer, expected, **CLOSE)
        return answer

    def _forward(self, samples: Any = RAGGED, **more: Any) -> Ask:
        inputs = self.model_tester.body.inputs(samples) | more
        return lambda model: model(**inputs).logits[inputs["attention_mask"].bool()]

    def _generate(self, samples: Any = RAGGED, **options: Any) -> Ask:
        inputs = self.model_tester.body.inputs(samples)
        return lambda model: _generated(model, inputs, **options)

    # One forward.

    def test_ask_forward_of_a_ragged_batch(self) -> None:
        self._same(self._forward())

    def test_ask_forward_of_one_sample_without_mask(self) -> None:
        inputs = self.model_tester.body.inputs(ONE)
        del inputs["attention_mask"]
        self._same(lambda model: model(**inputs).logits)

    def test_ask_forward_padded_on_the_right(self) -> None:
        inputs = _right_padded(self.model_tester.body.inputs(RAGGED))
        self._same(lambda model: model(**inputs).logits[inputs["attention_mask"].bool()])

    def test_ask_forward_with_eager_attention(self) -> None:
        self._same(self._forward(), attention="eager")

    def test_ask_forward_of_text_alone(self) -> None:
        self._same(self._forward([(3, 0, 6), (2, 0, 9)]))

    def test_ask_forward_with_text_beside_a_picture(self) -> None:
        self._same(self._forward([(3, 1, 6), (4, 0, 9)]))

    def test_ask_forward_without_cache(self) -> None:
        self._same(self._forward(use_cache=False))

    def test_ask_last_logits_alone(self) -> None:
        inputs = self.model_tester.body.inputs(RAGGED)
        self._same(lambda model: model(**inputs, logits_to_keep=1).logits)

    def test_ask_logits_of_chosen_rows(self) -> None:
        inputs = self.model_tester.body.inputs(ONE)
        self._same(lambda model: model(**inputs, logits_to_keep=torch.tensor([0, 5, 9])).logits)

    def test_ask_a_plain_tuple(self) -> None:
        inputs = self.model_tester.body.inputs(ONE)
        self._same(lambda model: model(**inputs, return_dict=False)[0])

    def test_ask_hidden_states_of_all_layers(self) -> None:
        inputs = self.model_tester.body.inputs(ONE)
        self._same(lambda model: model(**inputs, output_hidden_states=True).hidden_states)

    def test_ask_hidden_states_of_some_layers(self) -> None:
        inputs = self.model_tester.body.inputs(ONE)
        for chosen in (1, [0, 2, -1]):
            self._same(lambda model, chosen=chosen: model(**inputs, output_hidden_states=chosen).hidden_states)

    def test_ask_hidden_states_again(self) -> None:
        """transformers sets up what collects them in the first call that asks for them."""
        inputs = self.model_tester.body.inputs(ONE)
        self._same(lambda model: [model(**inputs, output_hidden_states=True).hidden_states for _ in range(2)])

    def test_ask_attentions_of_all_layers(self) -> None:
        inputs = self.model_tester.body.inputs(ONE)
        self._same(lambda model: model(**inputs, output_attentions=True).attentions, attention="eager")

    def test_ask_forward_in_bfloat16(self) -> None:
        inputs = self.model_tester.body.inputs(RAGGED)
        mask = inputs["attention_mask"].bool()
        inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
        self._same(lambda model: model.bfloat16()(**inputs).logits[mask].argmax(-1))

    def test_ask_packed_rows(self) -> None:
        """Samples one behind the other in one row, whose positions start again: text alone."""
        self._packed([(6, 0, 3), (2, 0, 4)])

    def test_ask_packed_rows_with_pictures(self) -> None:
        self._packed([(3, 1, 6), (2, 1, 4)])

    def _packed(self, samples: Any) -> None:
        body = self.model_tester.body
        inputs, rows = body.inputs(samples), body.inputs(samples)["attention_mask"].bool()
        packed = {name: x[rows][None] if x.shape == rows.shape else x for name, x in inputs.items()}
        del packed["attention_mask"]
        positions = torch.cat([torch.arange(int(n)) for n in rows.sum(1)])[None]
        # With several axes the first row is the text's, which says where a sample begins.
        axes = (positions,) if anatomy(body.model()).rotary_rows == 1 else (positions, positions.expand(4, 1, -1))
        for given in axes:
            self._same(lambda model, given=given: model(**packed, position_ids=given, use_cache=False).logits)

    def test_ask_positions_of_the_callers(self) -> None:
        inputs = self.model_tester.body.inputs([(3, 0, 6), (2, 0, 9)])
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        self._same(lambda model: model(**inputs, position_ids=positions).logits[mask.bool()])
        self._same(lambda model: _generated(model, inputs, position_ids=positions))

    def test_ask_a_mask_of_four_dimensions(self) -> None:
        """Two answers to one question in one row: the second does not see the first."""
        ids = torch.tensor([[1, 20, 21, 30, 31, 40, 41]])
        allowed = torch.ones(7, 7).tril()
        allowed[5:, 3:5] = 0
        mask = torch.zeros(1, 1, 7, 7).masked_fill(allowed == 0, torch.finfo(torch.float32).min)
        positions = torch.tensor([[0, 1, 2, 3, 4, 3, 4]])
        self._same(lambda model: model(input_ids=ids, attention_mask=mask, position_ids=positions).logits)

    def test_ask_a_mask_of_four_dimensions_alone(self) -> None:
        """Without positions: one word is not seen by those behind it."""
        ids = torch.tensor([[1, 20, 21, 30, 31, 40, 41]])
        allowed = torch.ones(7, 7).tril()
        allowed[4:, 3] = 0
        mask = torch.zeros(1, 1, 7, 7).masked_fill(allowed == 0, torch.finfo(torch.float32).min)
        self._same(lambda model: model(input_ids=ids, attention_mask=mask).logits)

    def test_ask_embeddings_instead_of_ids(self) -> None:
        ids = self.model_tester.body.inputs([(3, 0, 6)])["input_ids"]
        self._same(lambda model: model(inputs_embeds=model.get_input_embeddings()(ids)).logits)

    def test_ask_a_loss_and_its_gradients(self) -> None:
        inputs = self.model_tester.body.inputs(RAGGED)
        labels = inputs["input_ids"].masked_fill(~(inputs["attention_mask"].bool() & (inputs["input_ids"] > 10)), -100)

        def ask(model: Any) -> Any:
            model.zero_grad()
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

        self._same(ask)

    def test_ask_a_loss_in_training(self) -> None:
        inputs = self.model_tester.body.inputs(RAGGED)
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] <= 10, -100)
        self._same(lambda model: model.train()(**inputs, labels=labels).loss.detach())

    # Several forwards over one cache.

    def test_ask_steps_over_one_cache(self) -> None:
        self._steps(torch.tensor([[20], [21]]))

    def test_ask_several_rows_over_a_cache(self) -> None:
        self._steps(torch.tensor([[20, 21, 22, 23], [30, 31, 32, 33]]))

    def _steps(self, more: Tensor) -> None:
        """Two further calls with the rows ``more`` ``[B, n]``, over the prompt's cache; nothing is padded."""
        inputs = self.model_tester.body.inputs([(3, 1, 6)] * len(more))
        del inputs["attention_mask"]

        @torch.no_grad()
        def ask(model: Any) -> list[Tensor]:
            outputs = [model(**inputs, use_cache=True)]
            for _ in range(2):
                outputs.append(model(input_ids=more, past_key_values=outputs[-1].past_key_values))
            return [output.logits for output in outputs]

        self._same(ask)

    def test_ask_what_the_cache_holds(self) -> None:
        inputs = self.model_tester.body.inputs(RAGGED)

        def ask(model: Any) -> list[tuple[Tensor, Tensor]]:
            cache = model.generate(**inputs, **_settings()).past_key_values
            mask = inputs["attention_mask"][:, None, :, None]
            held = [(layer.keys, layer.values) for layer in cache.layers if hasattr(layer, "keys")]
            return [tuple(x[..., : mask.shape[2], :] * mask[:, :, -x.shape[2] :] for x in pair) for pair in held]

        self._same(ask)

    def test_ask_a_second_turn(self) -> None:
        body = self.model_tester.body
        inputs = body.inputs(ONE)

        def ask(model: Any) -> tuple[Tensor, Tensor]:
            first = model.generate(**inputs, **_settings())
            longer = body.extended(inputs, torch.cat([first.sequences[:, inputs["input_ids"].shape[1] :], _words()], dim=1))
            turn = body.without_pictures(longer)
            second = model.generate(**turn, past_key_values=first.past_key_values, **_settings())
            return first.sequences, torch.stack(second.logits)

        self._same(ask)

    def test_ask_a_cache_read_before(self) -> None:
        """A system prompt in a cache, which several requests go on with."""
        body = self.model_tester.body
        inputs = body.inputs(ONE)
        prefix = {name: x[:, :3] for name, x in inputs.items() if x.shape == inputs["input_ids"].shape}

        def ask(model: Any) -> list[Tensor]:
            cache = DynamicCache(config=model.config.get_text_config())
            with torch.no_grad():
                cache = model(**prefix, past_key_values=cache).past_key_values
            return [_generated(model, inputs, past_key_values=copy.deepcopy(cache)) for _ in range(2)]

        self._same(ask)

    # Generation.

    def test_ask_greedy(self) -> None:
        self._same(self._generate())

    def test_ask_greedy_with_eager_attention(self) -> None:
        self._same(self._generate(), attention="eager")

    def test_ask_greedy_without_cache(self) -> None:
        self._same(self._generate(use_cache=False))

    def test_ask_one_token(self) -> None:
        self._same(self._generate(max_new_tokens=1))

    def test_ask_greedy_of_text_alone(self) -> None:
        self._same(self._generate([(3, 0, 6), (2, 0, 9)]))

    def test_ask_samples(self) -> None:
        self._same(self._generate(do_sample=True, top_k=5, temperature=0.7))

    def test_ask_several_answers(self) -> None:
        self._same(self._generate(do_sample=True, num_return_sequences=3))

    def test_ask_beams(self) -> None:
        self._same(self._generate(num_beams=3))

    def test_ask_sampled_beams(self) -> None:
        self._same(self._generate(num_beams=3, do_sample=True, num_return_sequences=2))

    def test_ask_beams_with_scores(self) -> None:
        self._same(self._generate(num_beams=2, output_scores=True, length_penalty=2.0, early_stopping=True))

    def test_ask_processed_logits(self) -> None:
        self._same(self._generate(repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=4))

    def test_ask_an_end(self) -> None:
        """Samples that end before others go on as padding."""
        inputs = self.model_tester.body.inputs(RAGGED)
        end = dict(eos_token_id=_spoken(self, inputs), pad_token_id=0)
        self._same(lambda model: _generated(model, inputs, max_new_tokens=8, **end))

    def test_ask_to_stop(self) -> None:
        inputs = self.model_tester.body.inputs(RAGGED)
        end = _Longer(inputs["input_ids"].shape[1] + 1)
        self._same(lambda model: _generated(model, inputs, stopping_criteria=StoppingCriteriaList([end])))

    def test_ask_a_stream(self) -> None:
        inputs = self.model_tester.body.inputs(ONE)

        def ask(model: Any) -> list[Tensor]:
            heard = _Ear()
            model.generate(**inputs, **_settings(streamer=heard))
            return heard.tokens

        self._same(ask)

    def test_ask_hidden_states_of_each_step(self) -> None:
        inputs = self.model_tester.body.inputs(ONE)
        self._same(lambda model: model.generate(**inputs, **_settings(output_hidden_states=True)).hidden_states)

    def test_ask_attentions_of_each_step(self) -> None:
        inputs = self.model_tester.body.inputs(ONE)
        asked = dict(output_attentions=True)
        self._same(lambda model: model.generate(**inputs, **_settings(**asked)).attentions, attention="eager")

    def test_ask_prompt_lookup(self) -> None:
        self._same(self._generate(ONE, prompt_lookup_num_tokens=3, max_new_tokens=12, output_logits=False))

    def test_ask_an_assistant(self) -> None:
        assistant = self.model_tester.body.model(seed=1)
        self._same(self._generate(ONE, assistant_model=assistant, output_logits=False))

    def test_ask_guidance(self) -> None:
        """Classifier-free guidance: a second branch with a prompt of its own."""
        negative = torch.tensor([[1, 30, 31]])
        self._same(self._generate(ONE, guidance_scale=1.5, negative_prompt_ids=negative))

    def test_ask_a_prefill_in_chunks(self) -> None:
        self._same(self._generate([(3, 0, 30)], prefill_chunk_size=8))

    def test_ask_a_prefill_in_chunks_that_cut_a_picture(self) -> None:
        self._same(self._generate(ONE, prefill_chunk_size=8))

    def test_ask_embeddings(self) -> None:
        ids = self.model_tester.body.inputs([(3, 0, 6)])["input_ids"]
        self._same(lambda model: _generated(model, {"inputs_embeds": model.get_input_embeddings()(ids)}))

    def test_ask_a_dynamic_cache(self) -> None:
        self._same(self._generate(cache_implementation="dynamic"))

    def test_ask_an_offloaded_cache(self) -> None:
        self._same(self._generate(cache_implementation="offloaded"))

    def test_ask_a_static_cache(self) -> None:
        self._same(self._generate(cache_implementation="static", disable_compile=True))

    def test_ask_a_cache_of_the_callers(self) -> None:
        inputs = self.model_tester.body.inputs(ONE)

        def ask(model: Any) -> dict[str, Any]:
            return _generated(model, inputs, past_key_values=DynamicCache(config=model.config.get_text_config()))

        self._same(ask)

    def test_ask_a_cache_that_knows_no_windows(self) -> None:
        """Made without the config: layers with sliding attention hold everything, too."""
        inputs = self.model_tester.body.inputs(ONE)
        self._same(lambda model: _generated(model, inputs, past_key_values=DynamicCache()))

    def test_ask_left_and_unpadded_alike(self) -> None:
        body = self.model_tester.body
        padded = self._same(self._generate(output_logits=False))["sequences"][:, -6:]
        model = body.model()
        for place in range(len(RAGGED)):
            alone = _generated(model, body.inputs(RAGGED, only=place), output_logits=False)["sequences"]
            assert torch.equal(alone[0, -6:], padded[place])

    def test_ask_in_inference_mode(self) -> None:
        inputs = self.model_tester.body.inputs(ONE)

        def ask(model: Any) -> Tensor:
            with torch.inference_mode():
                return model(**inputs).logits

        self._same(ask)

    def test_ask_twice(self) -> None:
        ask = self._generate()
        self._same(lambda model: [ask(model), ask(model)])


class _Longer(StoppingCriteria):
    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] > self._rows)


class _Ear(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.tokens.append(value.clone())

    def end(self) -> None:
        pass


def _settings(**options: Any) -> dict[str, Any]:
    chosen = dict(
        max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True, suppress_tokens=MARKERS
    )
    return chosen | options


def _generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    output = model.generate(**inputs, **_settings(**options))
    kinds = ("sequences", "logits", "scores", "sequences_scores")
    return {kind: output[kind] for kind in kinds if output.get(kind) is not None}


def _words() -> Tensor:
    return torch.tensor([[31, 32, 33]])


def _spoken(test: Generation, inputs: dict[str, Tensor]) -> int:
    """A token that one of the answers contains."""
    with test.attached.paused():
        output = _generated(test.model_tester.body.model(), inputs, max_new_tokens=8)
    return int(output["sequences"][0, -5])


def _right_padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = inputs["attention_mask"].bool()
    order = mask.int().argsort(dim=1, descending=True, stable=True)
    return {name: x.gather(1, order) if x.shape == mask.shape else x for name, x in inputs.items()}
