import Foundation

/// What a package of `mm1 export coreml` says of itself, in its metadata.
public struct EncoderFacts: Sendable, Hashable {
    /// How a tile goes in.
    public enum Input: String, Sendable, Codable {
        /// A picture.
        case image
        /// Red, green and blue from 0 to 1, `[1, 3, S, S]`.
        case tensor
    }

    /// What it was laid out for, by coremltools' names.
    public enum Units: String, Sendable, Codable {
        case all = "ALL"
        case cpu = "CPU_ONLY"
        case gpu = "CPU_AND_GPU"
        case neuralEngine = "CPU_AND_NE"
    }

    /// Of the weights and config that it was made from.
    public let digest: String
    /// Sides of its tiles, in pixels.
    public let sizes: [Int]
    public let precision: String
    public let input: Input
    public let computeUnits: Units
    /// How a picture becomes a tile.
    public let fit: Fit

    /// - Parameter metadata: what Core ML calls `creatorDefinedKey`.
    /// - Throws: ``EncoderError/notDescribed``.
    public init(metadata: [String: String]) throws {
        do {
            let export: Export = try decode(Data(metadata["mm1.export", default: ""].utf8))
            let config: Config = try decode(Data(metadata["mm1.config", default: ""].utf8))
            digest = export.digest
            sizes = export.sizes
            precision = export.precision
            input = export.input
            computeUnits = export.computeUnits
            fit = config.image
        } catch {
            throw EncoderError.notDescribed
        }
        // A damaged package could ask for more memory than there is.
        guard !sizes.isEmpty, sizes.allSatisfy({ 1...8192 ~= $0 }), 1...8192 ~= fit.size,
            fit.size...65536 ~= fit.cropFrom ?? fit.size, fit.mean.count == 3
        else { throw EncoderError.notDescribed }
    }

    /// The function for tiles of a size; nil where there is one only.
    ///
    /// - Throws: ``EncoderError/noSuchSize(_:_:)``.
    public func function(for size: Int) throws -> String? {
        guard sizes.contains(size) else { throw EncoderError.noSuchSize(size, sizes) }
        return sizes.count > 1 ? "tile_\(size)" : nil
    }

    private struct Export: Decodable {
        let digest: String
        let sizes: [Int]
        let precision: String
        let input: Input
        let computeUnits: Units
    }

    private struct Config: Decodable {
        let image: Fit
    }
}

/// Why there are no image tokens.
public enum EncoderError: Error, Sendable, Hashable {
    /// The package does not say what it was made from.
    case notDescribed
    /// It has no tiles of this side, but of these.
    case noSuchSize(Int, [Int])
    /// It has an encoder, but no connector.
    case noImageTokens
    /// It cannot be read, or not be drawn.
    case noPicture
}

extension EncoderError: LocalizedError {
    public var errorDescription: String? {
        switch self {
        case .notDescribed:
            "the package does not say what it was made from; make it with mm1 export coreml"
        case .noSuchSize(let size, let sizes):
            "the package takes tiles of \(sizes) pixels, not \(size); "
                + "export it with --resolution \(size)"
        case .noImageTokens: "the package gives no image tokens: its model has no connector"
        case .noPicture: "the picture cannot be read"
        }
    }
}
