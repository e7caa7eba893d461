use serde_json::{json, Value};

use super::{case_id, parse, Edit, Precision};

fn good() -> Value {
    json!({
        "format": super::FORMAT,
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

#[test]
fn a_good_request() {
    let request = parse(good().to_string().as_bytes()).expect("a good request parses");
    assert_eq!(request.dtype, Precision::BFloat16);
    assert!(matches!(request.edits.first(), Some(Edit::Scale { factor, .. }) if *factor == 1.5));
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
