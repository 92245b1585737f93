//! Fuzzes the decoders of a guest's packets.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::network::packets(bytes);
});
