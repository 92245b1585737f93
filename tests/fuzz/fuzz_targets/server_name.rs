//! Fuzzes the decoders of the server's name at the beginning of a connection.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    cofferdam_fuzz::network::server_name(bytes);
});
