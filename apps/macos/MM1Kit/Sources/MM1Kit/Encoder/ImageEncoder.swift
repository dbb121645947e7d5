#if canImport(CoreML) && canImport(ImageIO)
    import CoreGraphics
    import CoreML
    import CoreVideo
    import Foundation

    /// The image tokens of one tile.
    public struct ImageTokens: Sendable, Hashable {
        /// How many there are, K.
        public let count: Int
        /// How wide each is, D.
        public let width: Int
        /// `[K, D]`, row after row.
        public let values: [Float]
    }

    /// Encoder and connector, by the package that `mm1 export coreml` writes.
    ///
    ///     let encoder = try await ImageEncoder(contentsOf: package)
    ///     let tokens = try await encoder.encode(picture)
    ///
    /// The tokens are for the decoder that runs in MLX.
    @available(macOS 15, iOS 18, *)
    public actor ImageEncoder {
        public nonisolated let facts: EncoderFacts
        /// Side of its tile, in pixels.
        public nonisolated let size: Int
        private let model: MLModel
        // What was compiled here, nil of what came compiled.
        private let temporary: URL?

        /// Reads a package, which Core ML compiles for this machine if it is not yet.
        ///
        /// - Parameters:
        ///   - package: an `.mlpackage`, or the `.mlmodelc` that Xcode makes of it.
        ///   - size: of its tiles, in pixels; nil takes the first.
        /// - Throws: ``EncoderError``, or Core ML's error.
        public init(contentsOf package: URL, size: Int? = nil) async throws {
            let isSource = package.pathExtension == "mlpackage"
            let compiled = isSource ? try await MLModel.compileModel(at: package) : package
            var isOpen = false
            defer {
                // What is compiled has the package's size, and nobody would find it any more.
                if isSource && !isOpen { try? FileManager.default.removeItem(at: compiled) }
            }
            // What it was laid out for stands in the package, which has to be opened first.
            let configuration = MLModelConfiguration()
            configuration.computeUnits = .cpuOnly
            let opened = try MLModel(contentsOf: compiled, configuration: configuration)
            let metadata = opened.modelDescription.metadata[.creatorDefinedKey]
            facts = try EncoderFacts(metadata: metadata as? [String: String] ?? [:])
            self.size = size ?? facts.sizes[0]
            configuration.functionName = try facts.function(for: self.size)
            configuration.computeUnits = facts.computeUnits.coreML
            model = try MLModel(contentsOf: compiled, configuration: configuration)
            temporary = isSource ? compiled : nil
            isOpen = true
        }

        deinit {
            if let temporary { try? FileManager.default.removeItem(at: temporary) }
        }

        /// The image tokens of a picture.
        ///
        /// - Throws: ``EncoderError``, or Core ML's error.
        public func encode(_ picture: Picture) throws -> ImageTokens {
            let input = try MLDictionaryFeatureProvider(dictionary: ["image": tile(picture)])
            let output = try model.prediction(from: input)
            guard let tokens = output.featureValue(for: "image_tokens")?.multiArrayValue,
                tokens.shape.count == 3
            else { throw EncoderError.noImageTokens }
            // [1, K, D].
            let shape = tokens.shape.map(\.intValue)
            let values = MLShapedArray<Float>(converting: tokens).scalars
            return ImageTokens(count: shape[1], width: shape[2], values: values)
        }

        private func tile(_ picture: Picture) throws -> MLFeatureValue {
            // No format has longer sides: the picture as it is.
            guard let whole = picture.drawn(atMost: 1 << 16), let context = draw(whole)
            else { throw EncoderError.noPicture }
            switch facts.input {
            case .image:
                guard let drawn = context.makeImage() else { throw EncoderError.noPicture }
                return try MLFeatureValue(
                    cgImage: drawn, pixelsWide: size, pixelsHigh: size,
                    pixelFormatType: kCVPixelFormatType_32BGRA, options: nil)
            case .tensor:
                guard let bytes = context.bytes else { throw EncoderError.noPicture }
                let array = MLShapedArray(scalars: planes(bytes), shape: [1, 3, size, size])
                return MLFeatureValue(multiArray: MLMultiArray(array))
            }
        }

        /// The picture as a tile: red, green, blue and one more byte a pixel.
        private func draw(_ picture: CGImage) -> CGContext? {
            guard let space = CGColorSpace(name: CGColorSpace.sRGB),
                let context = CGContext(
                    data: nil, width: size, height: size, bitsPerComponent: 8,
                    bytesPerRow: 4 * size, space: space,
                    bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue)
            else { return nil }
            let mean = facts.fit.mean.map { CGFloat($0) }
            context.setFillColor(red: mean[0], green: mean[1], blue: mean[2], alpha: 1)
            context.fill(CGRect(x: 0, y: 0, width: size, height: size))
            var place = facts.fit.place(width: picture.width, height: picture.height, in: size)
            // Core Graphics counts from the lower left corner.
            place.origin.y = CGFloat(size) - place.maxY
            // Of a picture that is not opaque, as mm1_mlx/image/decoding.py does.
            context.setFillColor(red: 1, green: 1, blue: 1, alpha: 1)
            context.fill(place)
            context.interpolationQuality = .high
            context.draw(picture, in: place)
            return context
        }
    }

    extension CGContext {
        /// A copy of its bytes, row after row.
        fileprivate var bytes: [UInt8]? {
            data.map { Array(UnsafeRawBufferPointer(start: $0, count: bytesPerRow * height)) }
        }
    }

    extension EncoderFacts.Units {
        fileprivate var coreML: MLComputeUnits {
            switch self {
            case .all: .all
            case .cpu: .cpuOnly
            case .gpu: .cpuAndGPU
            case .neuralEngine: .cpuAndNeuralEngine
            }
        }
    }
#endif
