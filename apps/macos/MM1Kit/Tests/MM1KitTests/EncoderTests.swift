import Foundation
import Testing

@testable import MM1Kit

/// What `mm1 export coreml` writes of mm1-tiny, for tiles of 56 and 112 pixels; a test of the
/// project holds it to the exporter.
private func described() throws -> [String: String] {
    let file = URL(fileURLWithPath: #filePath).deletingLastPathComponent()
        .appendingPathComponent("encoder.json")
    return try JSONDecoder().decode([String: String].self, from: Data(contentsOf: file))
}

private func fit(_ fields: String) throws -> Fit {
    try decode(Data(#"{"mean": [0.5, 0.5, 0.5], \#(fields)}"#.utf8))
}

@Test func aPackageSaysWhatItTakes() throws {
    let facts = try EncoderFacts(metadata: described())
    #expect(facts.sizes == [56, 112])
    #expect(facts.input == .image)
    #expect(facts.computeUnits == .gpu)
    #expect(facts.digest.count == 64)
    #expect(facts.fit.resize == .pad)
    #expect(facts.fit.size == 96)
    #expect(try facts.function(for: 112) == "tile_112")
    #expect(throws: EncoderError.noSuchSize(96, [56, 112])) { try facts.function(for: 96) }
}

@Test(arguments: ["sizes", "input", "compute_units", "digest"])
func aPackageOfSomebodyElseIsRefused(field: String) throws {
    var metadata = try described()
    let export = try #require(metadata["mm1.export"])
    metadata["mm1.export"] = export.replacingOccurrences(of: "\"\(field)\"", with: "\"other\"")
    #expect(metadata["mm1.export"] != export)
    #expect(throws: EncoderError.notDescribed) { try EncoderFacts(metadata: metadata) }
    #expect(throws: EncoderError.notDescribed) { try EncoderFacts(metadata: [:]) }
}

@Test(arguments: ["8", "9223372036854775807"])
func aCutThatNoPictureHasIsRefused(from: String) throws {
    var metadata = try described()
    let config = try #require(metadata["mm1.config"])
    metadata["mm1.config"] = config.replacingOccurrences(
        of: "\"crop_from\": null", with: "\"crop_from\": \(from)")
    #expect(metadata["mm1.config"] != config)
    #expect(throws: EncoderError.notDescribed) { try EncoderFacts(metadata: metadata) }
}

// The numbers of mm1_mlx/resize.py.
@Test(arguments: [
    (640, 480, "down", CGRect(x: -58, y: -16, width: 341, height: 256)),
    (644, 480, "down", CGRect(x: -59, y: -16, width: 343, height: 256)),
    (644, 480, "even", CGRect(x: -60, y: -16, width: 343, height: 256)),
    (37, 100, "down", CGRect(x: -16, y: -233, width: 256, height: 691)),
])
func aCutIsWhereTheRuntimeCuts(width: Int, height: Int, rounding: String, place: CGRect) throws {
    let fit = try fit(
        #""size": 224, "resize": "crop", "crop_from": 256, "crop_rounding": "\#(rounding)""#)
    #expect(fit.place(width: width, height: height, in: 224) == place)
}

@Test func tilesOfAnotherSizeAreCutLikewise() throws {
    let cut = try fit(#""size": 224, "resize": "crop", "crop_from": 256, "crop_rounding": "down""#)
    #expect(
        cut.place(width: 640, height: 480, in: 448)
            == CGRect(x: -117, y: -32, width: 682, height: 512))
    let whole = try fit(#""size": 336, "resize": "crop", "crop_rounding": "down""#)
    #expect(
        whole.place(width: 333, height: 500, in: 336)
            == CGRect(x: 0, y: -84, width: 336, height: 504))
}

@Test func aPictureIsSquashedOrPadded() throws {
    let squash = try fit(#""size": 96, "resize": "squash", "crop_rounding": "down""#)
    #expect(
        squash.place(width: 31, height: 700, in: 96) == CGRect(x: 0, y: 0, width: 96, height: 96))
    let pad = try fit(#""size": 96, "resize": "pad", "crop_rounding": "down""#)
    #expect(
        pad.place(width: 400, height: 201, in: 96)
            == CGRect(x: 0, y: 99 * 0.24, width: 96, height: 201 * 0.24))
    #expect(
        pad.place(width: 200, height: 400, in: 96) == CGRect(x: 24, y: 0, width: 48, height: 96))
}

@Test func coloursBecomePlanes() {
    let bytes: [UInt8] = [255, 0, 51, 7, 0, 102, 255, 7]
    #expect(planes(bytes) == [1, 0, 0, 0.4, 0.2, 1])
}

#if canImport(CoreML) && canImport(ImageIO)
    private let package = ProcessInfo.processInfo.environment["MM1_ENCODER"]

    /// Asked only where a package of mm1-tiny was made: `mm1 export coreml`.
    @available(macOS 15, iOS 18, *)
    @Test(.enabled(if: package != nil))
    func aPackageEncodesAPicture() async throws {
        let file = URL(fileURLWithPath: try #require(package))
        let encoder = try await ImageEncoder(contentsOf: file)
        let tokens = try await encoder.encode(picture("red-star"))
        #expect([tokens.count, tokens.width] == [36, 128])
        #expect(tokens.values.count == 36 * 128)
        #expect(tokens.values.allSatisfy(\.isFinite))
        #expect(try await encoder.encode(picture("four-shapes")) != tokens)
        await #expect(throws: EncoderError.noPicture) {
            try await encoder.encode(Picture(Data("not a picture".utf8)))
        }
        await #expect(throws: EncoderError.noSuchSize(7, encoder.facts.sizes)) {
            try await ImageEncoder(contentsOf: file, size: 7)
        }
    }
#endif
