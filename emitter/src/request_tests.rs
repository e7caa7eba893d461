use serde_json::{json, Value};

use super::{case_id, parse, Asked};
use crate::call_protocol::CALL_REQUEST;
use crate::forwards_protocol::FORWARDS_REQUEST;
use crate::protocol::{
    All, Edit, Layers, Loader, Precision, Request, TokenizeRequest, TRACE_REQUEST,
};

fn good() -> Value {
    json!({
        "format": TRACE_REQUEST,
        "case": {"id": "llama/hub/24", "digest": "00"},
        "model_dir": "/m", "tokens": [[1, 5, 7]], "captures": ["hook_embed"], "logits": true,
        "dtype": "bfloat16", "device": "cpu", "sae": null, "inputs": null, "sae_input": null,
        "edits": [{"hook": "hook_embed", "kind": "scale", "factor": 1.5}, {"hook": "hook_embed", "kind": "zero"}],
        "out": "/o/a.json"
    })
}

fn refusal(change: impl Fn(&mut Value)) -> String {
    let mut value = good();
    change(&mut value);
    match parse(value.to_string().as_bytes()) {
        Ok(_) => String::new(),
        Err(error) => {
            assert_eq!(error.kind(), "request");
            error.one_line()
        }
    }
}

fn trace_request(value: &Value) -> Request {
    match parse(value.to_string().as_bytes()) {
        Ok(Asked::Trace(request)) => *request,
        Ok(_) => panic!("taken for another request"),
        Err(error) => panic!("{error}"),
    }
}

fn tokenize_request(value: &Value) -> Result<TokenizeRequest, String> {
    match parse(value.to_string().as_bytes()) {
        Ok(Asked::Tokens(request)) => Ok(request),
        Ok(_) => Err("taken for another request".to_owned()),
        Err(error) => Err(error.one_line()),
    }
}

#[test]
fn a_good_request() {
    let request = trace_request(&good());
    assert_eq!(request.dtype, Precision::BFloat16);
    assert!(matches!(request.edits.first(), Some(Edit::Scale { factor, .. }) if *factor == 1.5));
}

#[test]
fn a_request_from_before_the_optional_keys_means_what_it_meant() {
    let request = trace_request(&good());
    assert_eq!(request.loader, Loader::Hf);
    assert!(request.project.is_empty());
}

#[test]
fn weights_need_from_pretrained_and_are_named_once() {
    let refused = |loader: &str, names: Value| {
        refusal(|r| {
            r["dtype"] = json!("float32");
            r["loader"] = json!(loader);
            r["weights"] = names.clone();
        })
    };
    assert!(refused("hf", json!(["a.weight"])).contains("loader is another"));
    let twice = refused("pretrained", json!(["a.weight", "a.weight"]));
    assert!(
        twice.contains("weights names a tensor twice: a.weight"),
        "{twice}"
    );
    let mut value = good();
    value["dtype"] = json!("float32");
    value["loader"] = json!("pretrained");
    value["weights"] = json!(["a.weight"]);
    assert_eq!(trace_request(&value).weights, ["a.weight"]);
}

#[test]
fn the_loader_is_one_of_three_and_from_pretrained_takes_float32_only() {
    let mut value = good();
    value["loader"] = json!("auto");
    assert_eq!(trace_request(&value).loader, Loader::Auto);
    value["loader"] = json!("pretrained");
    let half = refusal(|r| r["loader"] = json!("pretrained"));
    value["dtype"] = json!("float32");
    assert_eq!(trace_request(&value).loader, Loader::Pretrained);
    assert!(half.contains("always loads float32"), "{half}");
    assert!(refusal(|r| r["loader"] = json!("guess")).contains("guess"));
    assert!(!refusal(|r| r["loader"] = Value::Null).is_empty());
}

#[test]
fn projections_need_inputs_and_a_name_each() {
    assert!(refusal(|r| r["project"] = json!(["k"])).contains("inputs is null"));
    assert!(refusal(|r| {
        r["inputs"] = json!("/i");
        r["project"] = json!(["k", "k"]);
    })
    .contains("twice: k"));
}

#[test]
fn a_tokenising_request_is_told_apart_by_its_format() {
    let good = json!({
        "format": "candle-mi-parity/tokenize/1", "tokenizer": "/t/tokenizer.json", "texts": ["a", ""],
        "out": "/o/a.json"
    });
    let request = tokenize_request(&good).expect("a good request");
    assert_eq!(request.texts, ["a", ""]);
    for (key, value, told) in [
        ("case", json!({"id": "a", "digest": "00"}), "case"),
        ("out", json!("/o/a.txt"), ".json"),
        ("texts", json!([1]), "integer"),
        ("format", json!("candle-mi-parity/tokenize/2"), "tokenize/1"),
    ] {
        let mut bad = good.clone();
        bad[key] = value;
        let message = tokenize_request(&bad).expect_err("a bad request");
        assert!(message.contains(told), "{message}");
    }
}

#[test]
fn unknown_keys_are_refused_at_every_depth() {
    assert!(refusal(|r| r["colour"] = json!(1)).contains("colour"));
    assert!(refusal(|r| r["case"]["colour"] = json!(1)).contains("colour"));
    assert!(refusal(|r| r["edits"][0]["tensor"] = json!("k")).contains("tensor"));
    assert!(
        refusal(|r| r["sae"] = json!({"path": "p", "layer": 1, "hook": "h", "colour": 1}))
            .contains("colour")
    );
}

#[test]
fn the_format_is_judged_before_the_keys() {
    let told = refusal(|r| {
        r["format"] = json!("candle-mi-parity/request/2");
        r["colour"] = json!(1);
    });
    assert!(
        told.contains("request/2") && told.contains("request/1"),
        "{told}"
    );
}

#[test]
fn tokens_must_be_a_rectangle_of_ids() {
    assert!(refusal(|r| r["tokens"] = json!([])).contains("empty"));
    assert!(refusal(|r| r["tokens"] = json!([[]])).contains("row 0 is empty"));
    assert!(refusal(|r| r["tokens"] = json!([[1, 2], [3]])).contains("ragged"));
    assert!(refusal(|r| r["tokens"] = json!([[-1]])).contains("-1"));
}

#[test]
fn what_needs_another_field_says_so() {
    let fed = json!({"position": 1, "strength": 1.5, "tensor": "t"});
    let recurrent = json!({"layers": [0, 1], "depth": 2, "feedback": [fed]});
    assert!(refusal(|r| r["recurrent"] = recurrent.clone()).contains("inputs is null"));
    assert!(
        refusal(|r| r["edits"] = json!([{"hook": "h", "kind": "add", "tensor": "k"}]))
            .contains("inputs")
    );
    assert!(refusal(|r| {
        r["inputs"] = json!("/i");
        r["sae_input"] = json!("k");
    })
    .contains("sae is null"));
    assert!(refusal(|r| r["captures"] = json!(["hook_embed", "hook_embed"])).contains("twice"));
    assert!(refusal(|r| r["out"] = json!("/o/a.txt")).contains(".json"));
}

#[test]
fn a_duplicate_key_is_refused() {
    let line = good().to_string().replacen('{', "{\"logits\":false,", 1);
    assert!(parse(line.as_bytes()).is_err());
}

#[test]
fn a_bad_line_still_names_its_case() {
    let mut value = good();
    value["tokens"] = json!("no");
    assert_eq!(
        case_id(value.to_string().as_bytes()).as_deref(),
        Some("llama/hub/24")
    );
    assert_eq!(case_id(b"{nonsense"), None);
}

fn with_edits(edits: &Value) -> String {
    refusal(|value| value["edits"] = edits.clone())
}

#[test]
fn every_kind_of_edit_is_read() {
    let mut value = good();
    value["inputs"] = json!("/i.safetensors");
    let (scores, spec) = (
        "blocks.0.attn.hook_scores",
        json!({"heads": [1], "edges": [[2, 1]], "from_to": [{"query": 2, "keys": [0]}]}),
    );
    value["edits"] = json!([
        {"hook": "hook_embed", "kind": "replace", "tensor": "edit.0"},
        {"hook": "hook_embed", "kind": "add", "tensor": "edit.1"},
        {"hook": "hook_embed", "kind": "patch_at", "position": 2, "tensor": "edit.2"},
        {"hook": scores, "kind": "knockout", "spec": spec}
    ]);
    assert_eq!(trace_request(&value).edits.len(), 4);
    value["edits"] = json!([
        {"hook": "blocks.0.attn.hook_pattern", "kind": "steer", "how": "set_value", "value": 0.5, "spec": {}}
    ]);
    assert_eq!(trace_request(&value).edits.len(), 1);
}

#[test]
fn an_edit_that_cannot_be_made_is_refused() {
    let steer = json!({"hook": "h", "kind": "steer", "how": "scale", "value": 2.0, "spec": {}});
    for (edits, said) in [
        (json!([{"hook": "h", "kind": "negate"}]), "unknown variant"),
        (
            json!([{"hook": "h", "kind": "zero", "factor": 1.0}]),
            "unknown field",
        ),
        (
            json!([{"hook": "h", "kind": "inject", "position": 3, "features": []}]),
            "position 3 is outside",
        ),
        (
            json!([{"hook": "h", "kind": "inject", "position": 1, "features": [[0, 1.0]]}]),
            "needs an SAE",
        ),
        (
            json!([steer, {"hook": "h", "kind": "zero"}]),
            "stands alone",
        ),
        (
            json!([{"hook": "h", "kind": "add", "tensor": "a"}]),
            "inputs is null",
        ),
        (
            json!([{"hook": "h", "kind": "knockout", "spec": {"edges": [[1]]}}]),
            "invalid length",
        ),
    ] {
        let answer = with_edits(&edits);
        assert!(answer.contains(said), "{edits}: {answer}");
    }
}

fn call_refusal(calls: Value) -> String {
    let value = json!({
        "format": CALL_REQUEST, "case": {"id": "calls", "digest": "00"},
        "inputs": "/i.safetensors", "calls": calls, "out": "/o/a.json"
    });
    match parse(value.to_string().as_bytes()) {
        Ok(Asked::Calls(_)) => String::new(),
        Ok(_) => "taken for another request".to_owned(),
        Err(error) => error.one_line(),
    }
}

#[test]
fn a_call_is_read_and_an_unknown_argument_function_or_second_id_is_refused() {
    let good = json!({"id": "a", "run": {"fn": "sample_token", "logits": "x"}});
    assert_eq!(call_refusal(json!([good])), "");
    assert!(call_refusal(json!([good, good])).contains("twice"));
    assert!(call_refusal(json!([])).contains("empty"));
    for run in [
        json!({"fn": "sample_token", "logits": "x", "top_p": 1.0}),
        json!({"fn": "sample_tokens", "logits": "x"}),
        json!({"fn": "encode", "sae": {"path": "/s", "layer": 0}}),
    ] {
        assert_ne!(call_refusal(json!([{"id": "a", "run": run}])), "");
    }
}

fn forward_refusal(change: impl Fn(&mut Value)) -> String {
    let row = |name: &str| json!({"name": name, "captures": ["hook_embed"], "tokens": null, "edited": true, "anew": false});
    let mut value = json!({
        "format": FORWARDS_REQUEST, "case": {"id": "a/b", "digest": "00"}, "model_dir": "/m", "tokens": [[1, 5, 7]],
        "dtype": "float16", "device": "cpu", "sae": null, "inputs": null,
        "edits": [{"hook": "hook_embed", "kind": "zero"}], "forwards": [row("a"), row("b")], "known": ["00"],
        "out": "/o/a.json"
    });
    change(&mut value);
    match parse(value.to_string().as_bytes()) {
        Ok(Asked::Forwards(request)) => {
            assert_eq!((request.forwards.len(), request.edits.len()), (2, 1));
            String::new()
        }
        Ok(_) => "taken for another request".to_owned(),
        Err(error) => error.one_line(),
    }
}

#[test]
fn forwards_are_read_and_checked_like_a_trace() {
    assert_eq!(forward_refusal(|_| ()), "");
    type Change = fn(&mut Value);
    let bad: [(Change, &str); 12] = [
        (|r| r["forwards"] = json!([]), "forwards are empty"),
        (|r| r["forwards"][1]["name"] = json!("a"), "named twice: a"),
        (|r| r["forwards"][1]["colour"] = json!(1), "colour"),
        (
            |r| {
                r["dtype"] = json!("float16");
                r["forwards"][1]["loader"] = json!("pretrained");
            },
            "always loads float32",
        ),
        (
            |r| r["forwards"][1]["captures"] = json!(["h", "h"]),
            "capture named twice: h",
        ),
        (
            |r| r["forwards"][1]["tokens"] = json!([[1]]),
            "b: the edits are for the request's own tokens",
        ),
        (
            |r| {
                r["forwards"][1]["edited"] = json!(false);
                r["forwards"][1]["tokens"] = json!([[1, 2], [3]]);
            },
            "ragged",
        ),
        (|r| r["tokens"] = json!([]), "tokens are empty"),
        (|r| r["captures"] = json!([]), "captures"),
        (
            |r| r["edits"] = json!([{"hook": "h", "kind": "add", "tensor": "t"}]),
            "inputs is null",
        ),
        (
            |r| {
                r["edits"] = json!([{"hook": "h", "kind": "inject", "position": 0, "features": []}])
            },
            "needs an SAE",
        ),
        (|r| r["out"] = json!("/o/a"), "must end in .json"),
    ];
    for (change, said) in bad {
        let told = forward_refusal(change);
        assert!(told.contains(said), "{said}: {told}");
    }
}

#[test]
fn the_state_is_edited_in_a_layer_a_range_or_all_also_outside_of_the_prompt() {
    let edited = |layers: Value| {
        let mut value = good();
        value["edits"] = json!([
            {"hook": "blocks.1.rwkv.hook_state", "kind": "state_knockout", "at": [1, 9], "layers": layers}
        ]);
        match trace_request(&value).edits.pop() {
            Some(Edit::StateKnockout { at, layers, .. }) => (at, layers),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(edited(Value::Null), (vec![1, 9], None));
    assert_eq!(edited(json!([0, 2])).1, Some(Layers::Range(0, 2)));
    assert_eq!(edited(json!("all")).1, Some(Layers::Named(All::All)));
    let refused = refusal(|r| {
        r["edits"] = json!([
            {"hook": "blocks.1.rwkv.hook_state", "kind": "state_steer", "at": [1], "layers": "some", "factor": 2.0}
        ]);
    });
    assert!(refused.contains("not valid"), "{refused}");
}
