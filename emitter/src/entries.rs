//! Naming entries of the attention matrix to candle-mi.

/// `KnockoutSpec` and `SteeringSpec` name entries by the same methods, and share no trait.
macro_rules! name_entries {
    ($spec:expr, $chosen:expr) => {{
        let mut spec = $spec;
        if let Some(heads) = &$chosen.heads {
            spec = spec.heads(heads);
        }
        for (query, key) in &$chosen.edges {
            spec = spec.edge(*query, *key);
        }
        for query in &$chosen.from_positions {
            spec = spec.from_position(*query);
        }
        for key in &$chosen.to_positions {
            spec = spec.to_position(*key);
        }
        for fan in &$chosen.from_to {
            spec = spec.from_to_positions(fan.query, &fan.keys);
        }
        spec
    }};
}
pub(crate) use name_entries;
