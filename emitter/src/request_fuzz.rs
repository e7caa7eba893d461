//! Mutants of requests: each is parsed or refused in one line, and none panics. Seeded, so that a failure is one number.

use std::panic::{catch_unwind, AssertUnwindSafe};

use super::{case_id, parse};

const SEEDS: [&str; 4] = [
    r#"{"format":"candle-mi-parity/request/1","case":{"id":"a/b","digest":"00"},"model_dir":"/m","tokens":[[1,5,7],[1,2,3]],"captures":["hook_embed"],"logits":true,"dtype":"float32","device":"cpu","sae":{"path":"/s.npz","layer":1,"hook":"blocks.1.hook_resid_post"},"inputs":"/i","sae_input":"k","edits":[{"hook":"hook_embed","kind":"scale","factor":1.5},{"hook":"h","kind":"knockout","spec":{"heads":[0],"edges":[[1,0]],"from_to":[{"query":1,"keys":[0]}]}},{"hook":"h","kind":"patch_at","position":1,"tensor":"t"}],"recurrent":{"layers":[0,1],"depth":3,"feedback":[{"position":1,"strength":1.5,"tensor":"t"}]},"loader":"pretrained","project":["p"],"weights":["w"],"out":"/o/a.json"}"#,
    r#"{"format":"candle-mi-parity/tokenize/1","tokenizer":"/t.json","texts":["a","\u00e9"],"out":"/o/a.json"}"#,
    r#"{"format":"candle-mi-parity/call/1","case":{"id":"a","digest":"0"},"inputs":"/i","calls":[],"out":"/o/a.json"}"#,
    r#"{"format":"candle-mi-parity/forward/1","case":{"id":"a","digest":"0"},"model_dir":"/m","tokens":[[1,5]],"dtype":"float16","device":"cpu","sae":null,"inputs":null,"edits":[{"hook":"h","kind":"zero"}],"recurrent":{"layers":[0,0],"depth":2,"feedback":[]},"forwards":[{"name":"a","captures":["h"],"tokens":null,"edited":true,"anew":false},{"name":"b","captures":[],"tokens":[[2]],"edited":false,"anew":true}],"known":["0"],"out":"/o/a.json"}"#,
];
const ODD: [&[u8]; 14] = [
    b"null",
    b"true",
    b"-1",
    b"1e999",
    b"NaN",
    b"18446744073709551616",
    b"\"",
    b"\\ud800",
    b"[[[[[[[[[[",
    b"{\"a\":",
    b"\x00",
    b"\xff\xfe",
    b"\x1b[2J",
    b",",
];

/// Xorshift: the same mutants on every machine.
struct Draws(u64);

impl Draws {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % (limit.max(1) as u64)).unwrap_or(0)
    }
}

fn mutant(seed: u64) -> Vec<u8> {
    let mut draws = Draws(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    let mut line = SEEDS[draws.below(SEEDS.len())].as_bytes().to_vec();
    for _ in 0..=draws.below(3) {
        let at = draws.below(line.len() + 1);
        let end = (at + 1 + draws.below(12)).min(line.len());
        match draws.below(6) {
            0 => drop(line.drain(at..end)),
            1 => drop(line.splice(at..at, ODD[draws.below(ODD.len())].iter().copied())),
            2 => drop(line.splice(at..end, ODD[draws.below(ODD.len())].iter().copied())),
            3 => {
                let piece = line[at..end].to_vec();
                let to = draws.below(line.len() + 1);
                drop(line.splice(to..to, piece));
            }
            4 => line.truncate(at),
            _ => {
                let flip = 1 << draws.below(8);
                if let Some(byte) = line.get_mut(at) {
                    *byte ^= flip;
                }
            }
        }
    }
    line
}

#[test]
fn no_mutant_of_a_request_panics_or_is_refused_in_two_lines() {
    let (mut refused, mut parsed) = (0, 0);
    for seed in 0..50_000 {
        let line = mutant(seed);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let _ = case_id(&line);
            parse(&line).map(|_| ()).map_err(|error| error.one_line())
        }));
        match outcome {
            Ok(Ok(())) => parsed += 1,
            Ok(Err(said)) => {
                assert!(
                    !said.is_empty() && !said.contains('\n'),
                    "seed {seed}: {said}"
                );
                refused += 1;
            }
            Err(_) => panic!("seed {seed} panics: {}", String::from_utf8_lossy(&line)),
        }
    }
    assert!(
        refused > 10_000 && parsed > 500,
        "{refused} refused, {parsed} parsed: nothing is excited"
    );
}

#[test]
fn a_request_nested_too_deep_is_refused() {
    for open in ["[", "{\"a\":"] {
        let line = open.repeat(1_000_000);
        assert!(parse(line.as_bytes()).is_err() && case_id(line.as_bytes()).is_none());
        let inner = SEEDS[0].replace("[[1,5,7],[1,2,3]]", &open.repeat(1_000_000));
        assert!(parse(inner.as_bytes()).is_err());
    }
}
