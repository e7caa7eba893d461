use super::Failures;

fn failed(message: &str) -> candle_mi::Result<()> {
    Err(candle_mi::MIError::Tokenizer(message.to_owned()))
}

#[test]
fn a_text_without_a_failure_has_no_message() {
    let mut failures = Failures::default();
    assert_eq!(failures.keep("encode", Ok(3)), Some(3));
    assert_eq!(failures.told(), None);
}

#[test]
fn a_message_is_told_once_and_on_one_line() {
    let mut failures = Failures::default();
    for step in ["encode", "encode_raw"] {
        assert!(failures.keep(step, failed("no\nunk")).is_none());
    }
    assert!(failures.keep("decode", failed("other")).is_none());
    let told = failures.told().expect("something failed");
    assert!(
        told.starts_with("encode: ") && !told.contains("encode_raw"),
        "{told}"
    );
    assert!(told.contains("no; unk; decode: "), "{told}");
}
