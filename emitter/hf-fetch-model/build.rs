//! Tells the crate which of hf-fetch-model's signatures to have: from 0.9.6 on a listing takes an HTTP client.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-check-cfg=cfg(listing_takes_a_client)");
    let part = |name: &str| -> u64 {
        let text = std::env::var(format!("CARGO_PKG_VERSION_{name}")).unwrap_or_default();
        text.parse().unwrap_or(0)
    };
    if (part("MAJOR"), part("MINOR"), part("PATCH")) >= (0, 9, 6) {
        println!("cargo:rustc-cfg=listing_takes_a_client");
    }
}
