//! Fuzzes the decoder of outputs as a guest sends them.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::host::guest_tree(bytes);
});
