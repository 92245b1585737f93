//! Fuzzes the decoders of DNS messages.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::network::dns_message(bytes);
});
